"""What finished runs say: laws, fits, uncertainty, allocation, figures, reports.

Works on any table with N, D and loss columns and never imports JAX or another room of this project. Importing the
package alone loads nothing heavy; import the module you need, `analysis.report.findings` to begin with.
"""
