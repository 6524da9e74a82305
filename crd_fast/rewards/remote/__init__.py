"""Rewards that another process or machine computes: JSON over HTTP, both ends, and a reader of older servers.

`protocol` and `png` say what travels, `transport` how; `client` and `legacy` are rewards, `server` answers them with
the processes of `worker`, which run `scoring`.
"""
