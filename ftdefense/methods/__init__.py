"""How small functions become Methods: lifts, adapters, optimizers, schedules."""
