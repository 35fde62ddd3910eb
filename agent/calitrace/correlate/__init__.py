"""Pure joins: hops, drops, log lines and probes into journeys, journeys into verdicts."""
