"""From a release to numbers with intervals."""
