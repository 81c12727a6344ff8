"""Work on jobs: claim a job, run it in an engine process, store its result."""
