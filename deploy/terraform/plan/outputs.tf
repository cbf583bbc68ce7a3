output "nodes" {
  description = "Name and role of each machine."
  value       = { for i, role in local.roles : "${var.name}-${i}" => role }
}

output "blocks" {
  description = "Leases of GPUs: name, purpose, gpus, start and end (UTC)."
  value       = local.blocks
}

output "gpu_hours_a_week" {
  description = "GPU hours that one week costs."
  value       = length(var.block_days) * var.block_hours * (var.gpus.training + var.gpus.evaluation)
}

output "schedule" {
  description = "The same blocks as cron expressions (UTC), for clouds that scale by the clock. Cron's Monday is 1, its Sunday 0."
  value = {
    up   = "0 ${var.block_start_hour} * * ${join(",", [for d in sort([for d in var.block_days : tostring(d)]) : (tonumber(d) + 1) % 7])}"
    down = "0 ${(var.block_start_hour + var.block_hours) % 24} * * ${join(",", [for d in sort([for d in var.block_days : tostring(d)]) : (tonumber(d) + 1 + floor((var.block_start_hour + var.block_hours) / 24)) % 7])}"
  }
}

output "floating_ips" {
  description = "Which public addresses there are, and which machine has them."
  value       = merge({ permanent = "${var.name}-0" }, var.occasional_ip ? { occasional = "${var.name}-${var.nodes - 1}" } : {})
}

output "ingress" {
  description = "What may come in from outside the private network."
  value = {
    https      = { port = 443, cidr = var.clinic_cidr }
    dicom      = { port = 4242, cidr = var.clinic_cidr }
    ssh        = { port = 22, cidr = var.admin_cidr }
    kubernetes = { port = 6443, cidr = var.admin_cidr }
  }
}

output "storage_gb" {
  description = "Size of the persistent volume."
  value       = var.storage_gb
}

output "bucket" {
  description = "Bucket of the tracking server."
  value       = "mlflow-artifacts"
}
