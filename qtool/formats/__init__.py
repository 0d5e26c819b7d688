"""The file formats as data: code tables, thresholds, tensor names, byte sizes, reference rules.

Pure NumPy, written for reading; the backends are tested against it. Imports nothing else from
qtool.
"""
