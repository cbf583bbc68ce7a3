variable "name" {
  description = "First part of every name that is made."
  type        = string
  default     = "cxr"
}

variable "nodes" {
  description = "Virtual machines that run all the time."
  type        = number
  default     = 4
}

variable "storage_gb" {
  description = "Persistent volume, GB."
  type        = number
  default     = 100
}

variable "occasional_ip" {
  description = "A second public address."
  type        = bool
  default     = false
}

variable "gpus" {
  description = "GPUs of one block, by purpose."
  type        = object({ training = number, evaluation = number })
  default     = { training = 4, evaluation = 2 }
}

variable "first_monday" {
  description = "The Monday on which the plan of leases starts."
  type        = string
}

variable "weeks" {
  description = "How many weeks of leases are planned."
  type        = number
  default     = 4
}

variable "admin_cidr" {
  description = "The network from which operators come."
  type        = string
}

variable "clinic_cidr" {
  description = "The network from which films come."
  type        = string
}

variable "private_cidr" {
  description = "The private network."
  type        = string
  default     = "10.40.0.0/24"
}

variable "public_key" {
  description = "The operators' SSH key, public part."
  type        = string
}

variable "flavor" {
  description = "Flavor of the machines."
  type        = string
  default     = "m1.medium"
}

variable "image" {
  description = "Image of the machines."
  type        = string
  default     = "CC-Ubuntu24.04"
}

variable "gpu_flavor" {
  description = "Flavor of a leased machine."
  type        = string
  default     = "baremetal"
}

variable "gpu_image" {
  description = "Image of a leased machine, with the GPU's driver."
  type        = string
  default     = "CC-Ubuntu24.04-CUDA"
}

variable "reservations" {
  description = "Running leases: name of the machine to id of the reservation."
  type        = map(string)
  default     = {}
}

variable "public_network" {
  description = "The network that floating IPs come from."
  type        = string
  default     = "public"
}

variable "dns" {
  description = "Name servers."
  type        = list(string)
  default     = []
}

variable "block_days" {
  description = "Days of the week with a block of GPUs: 0 is Monday."
  type        = set(number)
  default     = [1, 4]
}

variable "block_start_hour" {
  description = "Hour at which a block starts, UTC."
  type        = number
  default     = 18
}

variable "block_hours" {
  description = "Length of one block, hours."
  type        = number
  default     = 6
}

variable "environment" {
  description = "What the machines are for: none, development, staging or production of deploy/helm. Machines on which it would not fit are refused."
  type        = string
  default     = "none"
}

variable "serving_gpus" {
  description = "Machines with one GPU each that run all the time, for the language service: 1 for staging, 2 for production."
  type        = number
  default     = 0
}

variable "gpus_per_host" {
  description = "GPUs of one leased machine: leases are for whole machines."
  type        = number
  default     = 4
}

variable "gpu_node_type" {
  description = "Type of the leased machines, as the cloud's reservations name it."
  type        = string
  default     = "gpu_a100_pcie"
}

variable "serving_flavor" {
  description = "Flavor of a machine with one GPU that runs all the time; needed with serving_gpus."
  type        = string
  default     = ""

  validation {
    condition     = var.serving_gpus == 0 || var.serving_flavor != ""
    error_message = "With serving_gpus, serving_flavor names a flavor of this cloud that has a GPU."
  }
}
