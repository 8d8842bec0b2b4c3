"""All pages and plots: of signals, of monitors, of trainings."""
