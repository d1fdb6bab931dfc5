"""Library code of the experiment scripts."""
