"""The command line `mezo`: one file for each verb."""
