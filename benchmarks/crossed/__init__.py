"""Ratings of lecturers by students: `lme4/InstEval`."""
