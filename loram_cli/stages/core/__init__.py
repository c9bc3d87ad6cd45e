"""What every stage shares: lifecycle, plan, lineage, card."""
