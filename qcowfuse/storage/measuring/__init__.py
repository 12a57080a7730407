"""Storages that wrap another one for measuring: ``latency`` puts a known delay (``delay_model``) on each access,
``memory`` locks an image in RAM.
"""
