"""What a catalogue needs after the first fit: unique ids, new items, refreshes, drift, a trie."""
