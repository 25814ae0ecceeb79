"""Comparisons: a grid of methods, data sets and seeds, trained as one job, and its table and figures.

`grid` says what is compared, `cells` and `claims` what is done and by whom, `worker` trains one cell after the other,
`job` runs workers until the grid is done, `table` and `figure` show the scores.
"""
