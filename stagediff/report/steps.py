"""Registers the report step."""

from stagediff.report import spec
from stagediff.steps import Step, register, register_ending

register(Step("report", spec.ReportSpec, "stagediff.report.page:compute"))
register_ending("stagediff.report.spec:add_report")
