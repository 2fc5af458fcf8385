"""Other people's formats: ids and models as the trainers, rankers and servers read them.

One file a format, the import beside the export where other people's files can be read back.
"""
