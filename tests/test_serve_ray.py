"""The service as a deployment of Ray Serve on this machine."""

from __future__ import annotations

import json
import socket
import urllib.request

import pytest

pytest.importorskip("fastapi")
ray_serve = pytest.importorskip("ray.serve", reason="pip install 'ray[serve]'")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_same_application_is_a_deployment(tmp_path):
    import ray

    from semid.serve.run import ray_deployment
    from serve_cases import make_shop

    shop = make_shop(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20)
    try:
        ray_serve.start(http_options={"host": "127.0.0.1", "port": port})
        settings = {"bundle": str(shop.bundle), "model": str(shop.model)}
        ray_serve.run(ray_deployment(cpus=0.5, **settings))
        body = json.dumps({"embeddings": shop.x[:4].tolist()}).encode()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/encode", body, 60) as response:
            answer = json.loads(response.read())
        assert response.headers["x-semid-version"] == "1"
        assert answer["codes"] == shop.tokenizer.encode(shop.x[:4]).codes.tolist()
    finally:
        ray_serve.shutdown()
        ray.shutdown()
