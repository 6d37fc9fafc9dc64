"""Meshes, sharding rules, FSDP collectives and multi-process coordination."""
