"""Adapters for the engines that run models. Each module imports its engine; this package none."""
