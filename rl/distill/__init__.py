"""`pipeline: distill`: sample (or import), verify, select, write one pool.

run        the four steps and the files that they leave
sample     which traces are wanted, which of them are in the journal, and asking for the rest
journal    what was received, on disk before anything else happens to it
api        a teacher behind an OpenAI-compatible URL
local      a teacher in this process
verify     rewards and measures of each trace
pool       selected traces as rows that `sft` reads
report     the figures, for people and for programs
"""
