"""Images: sources.py finds and splits them, decode.py decodes and caches them, dataset.py makes batches."""
