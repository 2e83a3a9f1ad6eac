"""Images: archives.py fetches, sources.py lists, load.py splits, decode.py decodes and caches, dataset.py batches."""
