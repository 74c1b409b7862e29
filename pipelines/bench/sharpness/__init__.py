"""What the source's detail is worth, by working size and by guide: `liveedit bench detail`.

May import data, modeling and the scores of `pipelines.evaluation`.
"""
