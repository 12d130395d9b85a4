"""Posteriors of several modes: does one call of ``fit`` find all of them, with their masses?"""
