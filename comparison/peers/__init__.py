"""Other model servers under the same load as ours: the same models, schedules, cores and clock."""
