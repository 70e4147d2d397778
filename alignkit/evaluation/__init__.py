"""What a run did: diversity within groups, monitors of reward hacking, and the report page."""
