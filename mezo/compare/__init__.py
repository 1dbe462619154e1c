"""`mezo compare`: many methods on one task, in one table, one page and a few plots."""
