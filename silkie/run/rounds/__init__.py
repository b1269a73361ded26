"""On-policy rounds, `silkie loop FILE.yaml`: sample from the policy as it is, have a judge rate the answers, build the
pairs, train on from the policy, evaluate; again.

Every stage is one of silkie's commands in a process of its own, and each of them resumes by itself. What the loop adds
is their order, the folder of a round, a file that says which stages are done, and one report over the rounds.
"""
