"""Methods of other papers, each written from its paper as a rule or an estimator of a user's own.

README.md says which paper each comes from, with which settings, and what differs.
"""
