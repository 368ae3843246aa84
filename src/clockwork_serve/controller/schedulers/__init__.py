"""controller/schedulers"""
