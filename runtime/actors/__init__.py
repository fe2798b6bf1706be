"""Thin adapters to Ray: a cluster to work in, a group of actors, jobs. Nothing else in runtime imports Ray."""
