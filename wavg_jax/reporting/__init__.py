"""From rows to statistics, findings, plots and documents."""
