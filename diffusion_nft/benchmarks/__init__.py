"""Library code of the benchmark scripts."""
