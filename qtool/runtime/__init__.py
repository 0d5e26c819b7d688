"""Running models: packed linear layers inside transformers' model classes, and text generation.

Needs the [run] extra. This package file itself imports nothing heavy, so that a missing extra can
be told (`qtool.runtime.requirements`); everything else here imports torch and transformers.
"""
