"""A judge reads two continuations of the same opening and says which is better, and why.

A judge is any object with `identity` (who it is, as JSON values) and `answers(prompts)`: a model
behind an HTTP endpoint, a local chat model, a rule, or a plain function made into one.
"""
