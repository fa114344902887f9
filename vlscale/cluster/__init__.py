"""Starting a run on several hosts over ssh: checked before it starts, watched while it runs, gone when it ends."""
