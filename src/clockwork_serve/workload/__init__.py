"""Workloads: what is asked, of which models and when; it runs nothing and reads no clock."""
