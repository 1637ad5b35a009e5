"""The ten-minute check of the CUDA path: ``python -m stepfuse.bench.gpu_check --out FOLDER``."""
