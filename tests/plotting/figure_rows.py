"""Rows of figures."""

from hypothesis import strategies as st

from puzzle.plotting.irregularities import PUBLISHED

seconds = st.floats(0.001, 1e4)
series = st.lists(seconds, min_size=3, max_size=9)


def rows_of(figure, runs):
    return {(row.cluster, row.config, row.series, row.unit): row for row in figure.numbers(runs, PUBLISHED)}
