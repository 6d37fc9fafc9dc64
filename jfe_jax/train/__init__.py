"""The training loop: state, step, optimizer, schedules, preemption."""
