"""Schedules in virtual time: costs, timelines, and the search for shared pipelines."""
