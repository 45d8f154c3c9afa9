"""Registers the report step."""

from stagediff.report import spec
from stagediff.steps import Step, register, register_ending

register(Step("report", spec.ReportSpec, "stagediff.report.page:compute", estimate="stagediff.report.estimate:report"))
register_ending("stagediff.report.spec:add_report")
