"""Parts of tools/bench_training."""
