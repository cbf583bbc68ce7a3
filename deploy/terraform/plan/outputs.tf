output "nodes" {
  description = "Name and role of each machine."
  value       = { for i, role in local.roles : "${var.name}-${i}" => role }
}

output "serving" {
  description = "Names of the machines with a GPU that run all the time."
  value       = [for i in range(var.serving_gpus) : "${var.name}-gpu-${i}"]
}

output "capacity" {
  description = "What the environment asks for, and what the machines offer it."
  value       = { needs = local.needs, offer = local.offer }

  precondition {
    condition     = local.offer.cores >= local.needs.cores && local.offer.memory_gb >= local.needs.memory_gb && local.offer.largest_gb >= local.needs.largest_gb && local.offer.gpus >= local.needs.gpus
    error_message = "${var.environment} asks for ${local.needs.cores} processors, ${local.needs.memory_gb} GB of memory (${local.needs.largest_gb} GB of them on one machine) and ${local.needs.gpus} GPUs that are always there; these machines offer ${local.offer.cores}, ${local.offer.memory_gb} (${local.offer.largest_gb}) and ${local.offer.gpus}. Take more or larger machines (nodes, machine with its flavor or instance type, serving_gpus)."
  }
}

output "blocks" {
  description = "Leases of GPUs: name, purpose, gpus, hosts (whole machines that have them), start and end (UTC)."
  value       = local.blocks
}

output "gpu_machines" {
  description = "Whole machines that a block takes: each purpose has its own, as in its lease."
  value       = sum([for purpose in ["training", "evaluation"] : ceil(var.gpus[purpose] / var.gpus_per_host)])
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
