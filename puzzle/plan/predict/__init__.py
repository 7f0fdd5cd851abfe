"""What a run would take: costs of passes, stages and switches in closed form, without devices."""
