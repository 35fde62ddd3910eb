"""Pure rendering of verdicts and journeys."""
