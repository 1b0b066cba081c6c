"""Backup and restore of all that an Everloop has learned: database, adapters, backbones, datasets, settings."""
