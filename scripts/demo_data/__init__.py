"""Everything the demo model learns from: words, skills, pictures, conversations and their packing into batches.

Read `words` (the vocabulary), then `conversation` (what one training example is), then the skills
(`pictures`, `facts`, `texts`) and their one registry, `skills`.
"""
