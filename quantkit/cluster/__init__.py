"""Builds as Slurm jobs: arrays with one task per artifact, then one job that reports and publishes.

A job that is preempted or reaches its time limit goes back into the queue, and `quantkit build` there continues from
its last finished layer. Every task runs the same command that a user would type, and leaves its exit code beside its
log; what the queue says is asked only of tasks that have left none.
"""
