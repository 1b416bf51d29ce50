"""The field's cross-modal benchmarks as tasks: a table, readers, a runner, a report (paper 4.3)."""
