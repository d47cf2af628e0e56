"""Benchmarks: implementations of one question, each answer checked before it is timed, all of them timed in turns."""
