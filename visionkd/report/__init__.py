"""One self-contained HTML page about a run: ``render_report(ReportData(...))`` from :mod:`visionkd.report.html`."""
