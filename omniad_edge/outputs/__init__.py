"""Where verdicts go: each behind its own bounded queue."""
